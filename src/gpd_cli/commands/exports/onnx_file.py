"""Writing of ONNX files, which are tested with onnxruntime before they are kept."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from gpd_cli.commands.exports.program import Traced
from gpd_cli.errors import GpdError
from gpd_cli.teacher.compare import relative_difference

INPUT, OUTPUT = "images", "logits"
_ROUNDING, _HALF_ROUNDING = 1e-4, 3e-2  # tolerated relative differences in float32 and float16
_EXTRA = "Writing ONNX needs further packages: pip install 'gpd-cli[onnx]'."
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def check_packages() -> None:
    """Check that the packages for writing ONNX files are installed.

    Raises:
        GpdError: when a package is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise GpdError(_EXTRA) from error


def write_onnx(
    traced: Traced, path: Path, metadata: Mapping[str, str], *, name: str, half: bool
) -> None:
    """Write a traced network as ONNX.

    Args:
        traced: the traced network.
        path: path of the file to write; the caller makes the writing atomic.
        metadata: texts by name, for the file's ``metadata_props``.
        name: name of the network, for error messages.
        half: whether the network computes in float16.

    Raises:
        GpdError: when the exporter cannot convert the network, or onnxruntime's logits differ.
    """
    import onnx

    try:
        with _silence():
            torch.onnx.export(
                traced.program,
                (traced.sample,),
                str(path),
                dynamo=True,
                dynamic_shapes=traced.shapes,
                input_names=[INPUT],
                output_names=[OUTPUT],
                external_data=False,
                verbose=False,
            )
    except OSError:
        raise
    except Exception as error:  # torch raises many types for networks that it cannot convert
        raise GpdError(
            f"torch's ONNX exporter cannot convert {name} ({_reason(error)}); write a .pt2 file "
            "instead, which runs wherever torch does."
        ) from error
    model = onnx.load(path)
    for node in [*model.graph.node, *(n for f in model.functions for n in f.node)]:
        del node.metadata_props[:]  # stack traces with paths of this machine
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, path)
    _check(traced, path, name, _HALF_ROUNDING if half else _ROUNDING)


def _check(traced: Traced, path: Path, name: str, allowed: float) -> None:
    """Run the file with onnxruntime on batches of several sizes, and compare with torch's logits.

    Args:
        traced: the traced network.
        path: path of the ONNX file.
        name: name of the network, for error messages.
        allowed: largest relative difference of the logits.

    Raises:
        GpdError: when onnxruntime fails, or the logits differ.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        for images in (traced.sample, traced.sample[:1], traced.sample.repeat(3, 1, 1, 1)[:5]):
            (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
            with torch.no_grad():
                wanted = traced.module(images)
            difference = relative_difference(torch.from_numpy(logits), wanted)
            if not difference <= allowed:
                raise GpdError(
                    f"onnxruntime's logits of {name} differ from torch's by {difference:.1e}, so "
                    "the file was not kept; write a .pt2 file instead."
                )
    except GpdError:
        raise
    except Exception as error:
        raise GpdError(
            f"onnxruntime cannot run the file of {name} ({_reason(error)}), so the file was not "
            "kept; write a .pt2 file instead."
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of an error's innermost cause, cut to 160 characters."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__
    text = _ESCAPES.sub("", texts[-1]).strip().splitlines()[0]
    return text.rstrip(". ") if len(text) <= 160 else f"{text[:160].rpartition(' ')[0]} ..."


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the exporter's output, which is meant for the exporter's developers."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
