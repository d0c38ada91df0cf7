"""Images and labels out of WebDataset shards, so that no image is left out without a word.

timm's reader leaves out images that it cannot decode, images without label, and samples whose image
has another ending than it expects. But labels may be missing where images are only predicted, and
an evaluation has to score every image.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial, reduce
from typing import Any

from PIL import Image
from timm.data.readers import reader_wds
from timm.data.readers.reader_wds import ReaderWds

from gpd_cli.data.sources import UNKNOWN, LabelError, UnreadableImageError
from gpd_cli.errors import DataError, GpdError

IMAGE_KEYS = "jpg;jpeg;png;webp"
"""Endings of the files that hold a sample's image, unless ``--data.input_key`` names others."""

_LABEL = "cls"  # ending of the file that holds a sample's label, unless a target key is given
_FIELDS = "json"  # ending of the file with the field that the target key names


class ShardReader(ReaderWds):
    """timm's reader of WebDataset with another decoding of samples, `decode_sample`.

    In training, images that cannot be decoded are left out with a warning, as by timm; in
    evaluation they are errors, as are damaged shards.

    Attributes:
        unlabelled: whether images need no label; set before the images are read.
    """

    unlabelled = False

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

        decode = partial(
            decode_sample,
            image_keys=self.input_key.split(";"),
            target_key=self.target_key or self.split_info.alt_label or None,
            unlabelled=self.unlabelled,
        )
        # timm's pipeline ends in three stages: the samples of a shard, their decoding, and the
        # renaming of their entries.
        stages: list[Any] = self.ds.pipeline  # type: ignore[attr-defined]
        stages[-2] = wds.map(decode, handler=_left_out if self.is_training else _raised)
        if not self.is_training:
            stages[-3] = wds.tarfile_to_samples(handler=_raised)


def decode_sample(
    sample: Mapping[str, Any],
    *,
    image_keys: Sequence[str],
    target_key: str | None,
    unlabelled: bool,
) -> dict[str, Any]:
    """Decode image and label of a sample of a shard.

    Args:
        sample: the contents of the sample's files, by their endings.
        image_keys: endings of files that hold an image; the first that exists is taken.
        target_key: name of the field of the sample's JSON file that holds the label, or its path
            with slashes (``objects/label``); None for a label in a file of its own (``.cls``).
        unlabelled: whether the image needs no label.

    Returns:
        The image, under the first of the image keys, and ``target``: the label, or `UNKNOWN` for an
        image without label.

    Raises:
        DataError: when the sample has no file of such an ending.
        UnreadableImageError: when the sample's image cannot be decoded.
        LabelError: when the label is missing and needed.
    """
    name = f"'{sample.get('__key__')}' in {sample.get('__url__')}"
    endings = ", ".join(key for key in sample if not key.startswith("__"))
    image_key = next((key for key in image_keys if key in sample), None)
    if image_key is None:
        raise DataError(
            f"The sample {name} has no image under {' or '.join(image_keys)} (it has: {endings}); "
            "set --data.input_key to the ending of the images."
        )
    try:
        image = Image.open(io.BytesIO(sample[image_key]))
        image.load()
    except Exception as error:  # decoders raise errors of any type
        raise UnreadableImageError.of(f"The image {name}", error) from error
    try:
        label = _label(sample, target_key)
    except (LookupError, TypeError, ValueError) as error:
        if not unlabelled:
            field = f".{_LABEL}" if target_key is None else f".{_FIELDS} under '{target_key}'"
            raise LabelError(
                f"The sample {name} has no label in {field} (it has: {endings}); set "
                "--data.target_key to the field of the JSON file with class numbers, or use gpd "
                "predict, which needs no labels."
            ) from error
        label = UNKNOWN
    return {image_keys[0]: image, "target": label}


def _label(sample: Mapping[str, Any], target_key: str | None) -> Any:
    """The label of a sample: a number, or any other value that the field holds.

    Raises:
        LookupError: when there is no such file or field.
        TypeError: when the path of the field leads through a value without fields.
        ValueError: when the file cannot be understood.
    """
    if target_key is None:
        label: Any = int(sample[_LABEL])
    else:
        fields = json.loads(sample[_FIELDS])
        path = [target_key] if target_key in fields else target_key.split("/")
        label = reduce(lambda found, part: found[part], path, fields)
        if isinstance(label, str | float):  # a number may be written as text, or with a point
            with suppress(ValueError, OverflowError):
                label = int(label) if float(label).is_integer() else label
    return UNKNOWN if isinstance(label, int) and label < 0 else label


def _left_out(error: Exception) -> bool:
    if isinstance(error, GpdError) and not isinstance(error, UnreadableImageError):
        raise error
    return bool(reader_wds.log_and_continue(error))


def _raised(error: Exception) -> bool:
    raise error
