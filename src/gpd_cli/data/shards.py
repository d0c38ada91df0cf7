"""Images and labels out of WebDataset shards, so that no image is left out without a word.

timm's reader leaves out images that it cannot decode, images without label, and samples whose image
has another ending than it expects. Labels may be missing where images are only predicted, and an
evaluation has to score every image; so samples are decoded here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.data.readers import reader_wds
from timm.data.readers.reader_wds import ReaderWds

from gpd_cli.data.sources import UNKNOWN, UnreadableImageError
from gpd_cli.errors import DataError, GpdError, reason_of

IMAGE_KEYS = "jpg;jpeg;png;webp"
"""Endings of the files that hold a sample's image, unless ``--data.input_key`` names others."""

_Sample = dict[str, Any]


class ShardReader(ReaderWds):
    """timm's reader of WebDataset, which decodes samples by `decode_sample`.

    In training, images that cannot be decoded are left out with a warning, as timm does; in
    evaluation they are errors, as are damaged shards.
    """

    @classmethod
    def convert(cls, reader: ReaderWds) -> None:
        """Make a reader of timm's class one of this class.

        Args:
            reader: the reader, changed in place.
        """
        reader.__class__ = cls

    def _lazy_init(self) -> None:
        super()._lazy_init()  # type: ignore[no-untyped-call]
        import webdataset as wds  # type: ignore[import-untyped] # optional

        labelled = partial(
            reader_wds._decode,
            image_key=self.input_key,
            image_mode=self.input_img_mode,
            target_key=getattr(self, "target_keys", None) or self.target_key,
            alt_label=self.split_info.alt_label,
        )
        bare = partial(reader_wds._decode, image_key=self.input_key, image_mode=self.input_img_mode)
        needs_json = bool(self.target_key or self.split_info.alt_label)
        decode = partial(
            decode_sample,
            labelled=labelled,
            bare=bare,
            label_key="json" if needs_json else "cls",
            image_keys=self.input_key.split(";"),
        )
        # The last stages are: samples out of the files, decoding, and renaming of the entries.
        stages: list[Any] = self.ds.pipeline  # type: ignore[attr-defined]
        stages[-2] = wds.map(decode, handler=_left_out if self.is_training else _raised)
        if not self.is_training:
            stages[-3] = wds.tarfile_to_samples(handler=_raised)


def decode_sample(
    sample: _Sample,
    *,
    labelled: Callable[[_Sample], _Sample | None],
    bare: Callable[[_Sample], _Sample],
    label_key: str,
    image_keys: list[str],
) -> _Sample:
    """Decode a sample of a shard; an image without label has the label `UNKNOWN`.

    Args:
        sample: the sample's files by their endings.
        labelled: function that decodes image and label; None for a negative label.
        bare: function that decodes the image and a label from the entry ``cls``.
        label_key: ending of the file with the label.
        image_keys: endings of files that hold an image; the first that exists is taken.

    Raises:
        DataError: when the sample has no file of such an ending.
        UnreadableImageError: when the sample's image cannot be decoded.
    """
    name = f"'{sample.get('__key__')}' in {sample.get('__url__')}"
    if not any(key in sample for key in image_keys):
        endings = ", ".join(key for key in sample if not key.startswith("__"))
        raise DataError(
            f"The sample {name} has no image under {' or '.join(image_keys)} (it has: {endings}); "
            "set --data.input_key to the ending of the images."
        )
    try:
        found = labelled(sample) if label_key in sample else None
        found = bare({**sample, "cls": UNKNOWN}) if found is None else found
        # The stage that follows looks for the image under the keys of images.
        return {image_keys[0]: found["jpg"], "target": found["target"]}
    except OSError as error:  # Pillow's errors are of this type
        raise UnreadableImageError(
            f"The image {name} cannot be read ({reason_of(error)}); replace it or remove it from "
            "the data."
        ) from error


def _left_out(error: Exception) -> bool:
    if isinstance(error, GpdError) and not isinstance(error, UnreadableImageError):
        raise error
    return bool(reader_wds.log_and_continue(error))


def _raised(error: Exception) -> bool:
    raise error
