"""A conversion from a source that is quantized -> the same one that keeps the source's numbers.

Rounds nothing.  What no format of compressed-tensors holds as it is becomes wider.
"""

from collections.abc import Callable
from dataclasses import replace

from persimmon.kernels import QuantizedFormat
from persimmon.model.convert.compressed_layout import MadeMatrix, StoredPart, with_quantized
from persimmon.model.convert.new_config import SMALL_AGAIN
from persimmon.model.convert.sources import QuantizedSource
from persimmon.model.convert.writer import Conversion
from persimmon.model.leftovers import EMBEDDING

_LISTED = 3


def keep_quantized(conversion: Conversion, print_line: Callable[[str], None], *, widen: bool) -> Conversion:
    """The conversion with the source's own numbers and scales.

    An embedding is kept only in 8 bits with a scale for each row, the one format that kernels look up, and only where
    lm_head does not share it, since readers of compressed-tensors do not share a quantized matrix.

    Args:
        conversion: of any source.
        print_line: takes lines that say what is kept and what is widened.
        widen: whether nothing is kept, because a type was asked for.
    """
    forms: dict[str, QuantizedFormat] = {}
    parts: dict[str, dict[str, StoredPart]] = {}
    widened: list[str] = []
    for name, tensor in conversion.tensors.items():
        if not isinstance(tensor, QuantizedSource) or not tensor.compressed:
            continue
        form = tensor.form
        if widen or form is None or (name == EMBEDDING and not _can_be_embedding(form, conversion)):
            widened.append(name)
        else:
            forms[name] = form
            parts[name] = MadeMatrix(name=name, shape=tensor.shape, form=form, make=tensor.matrix).parts()
    source, stored = conversion.origin["source"], str(conversion.dtype).removeprefix("torch.")
    if forms:
        kinds = " and ".join(dict.fromkeys(map(str, forms.values())))
        print_line(f"{source}: {len(forms)} matrices keep their numbers and scales: {kinds}")
    if widened:
        reason = "" if widen else ", because no format that is read holds their numbers as they are"
        print_line(f"{source}: {_listed(widened)} become {stored}{reason}: {SMALL_AGAIN}")
    if not forms:
        return conversion
    return replace(
        with_quantized(conversion, forms, parts),
        origin={**conversion.origin, "kept": {name: str(form) for name, form in forms.items()}},
    )


def _can_be_embedding(form: QuantizedFormat, conversion: Conversion) -> bool:
    shared = conversion.config.generates and conversion.config.tie_word_embeddings
    return form.bits == 8 and form.group_size is None and not shared


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
