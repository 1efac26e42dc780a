"""`vimpac import-checkpoint`: a snapshot of the paper's released program → a model of this one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vimpac.config import SPECIAL_IDS, ModelConfig
from vimpac.console import count, say
from vimpac.errors import InputError
from vimpac.files.atomic import make_folder

if TYPE_CHECKING:
    from vimpac.snapshot import Imported


def import_checkpoint(
    path: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    heads: int | None = None,
    layout: str | None = None,
    vocab_size: int | None = None,
) -> None:
    """Read a snapshot of the paper's released program, pre-trained or fine-tuned, and write it as a model of this program.

    Sizes are taken from the names and shapes of its tensors. Nothing in the file is run, and args.pickle is not opened.

    Example: vimpac import-checkpoint snapshot/classifier.pt imported

    Args:
        path: A file of weights, or a folder that holds one.
        out: A new folder for model.safetensors, or a new .safetensors file.
        heads: Attention heads, which no shape shows; None = 64 wide as in the presets, 32 in halved attention.
        layout: Attention blocks of a layer, such as T,H|W; None = the layout of Table 13 with as many axes in each block.
        vocab_size: Keep this many codes, the first, and the special ids after the last; None = all.
    """
    from vimpac import weights
    from vimpac.snapshot import import_snapshot

    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists, expected a new folder or file: choose another, or remove it")
    imported = import_snapshot(path, heads, layout, vocab_size)
    written = out
    if out.suffix != ".safetensors":
        make_folder(out)
        written = out / "model.safetensors"
    weights.save(imported.model, written)
    for line in _found(imported, heads is None, layout is None):
        say(line)
    say(f"wrote {written}")


def _found(imported: Imported, usual_heads: bool, usual_layout: bool) -> list[str]:
    """What the snapshot is, and which of it was assumed."""
    from vimpac.model import ClassificationModel

    model, config = imported.model, imported.model.config
    fine_tuned = isinstance(model, ClassificationModel)
    classes = f", {count(model.classifier.out_features, 'class', 'classes')}" if fine_tuned else ""
    presets = {"Small": ModelConfig.small(), "Base": ModelConfig.base(), "Large-Half": ModelConfig.large_half()}
    name = next((f", {name}" for name, preset in presets.items() if _sizes(preset) == _sizes(config)), "")
    frames, height, width = config.grid
    cut = f", the first of {imported.codes}" if imported.codes != config.vocab_size else ""
    head_width = config.key_width // config.heads
    return [
        f"{imported.file}: a {'fine-tuned' if fine_tuned else 'pre-trained'} snapshot{classes}",
        f"  size        {count(config.layers, 'layer')}, width {config.width}, attention {config.key_width}, "
        f"MLP {config.hidden_width}{name}",
        f"  heads       {config.heads}, each {head_width} wide{', assumed as in the presets (--heads)' * usual_heads}",
        f"  layout      {config.layout}{', assumed from the number of axes in each block (--layout)' * usual_layout}",
        f"  norm        {config.norm}",
        f"  grid        {frames} × {height} × {width}: {count(frames, 'frame')} of {8 * height} × {8 * width} pixels",
        f"  vocabulary  {count(config.vocab_size, 'code')}{cut}, and {SPECIAL_IDS} special ids, the table's last rows",
    ]


def _sizes(config: ModelConfig) -> tuple[int, ...]:
    return config.layers, config.width, config.key_width, config.hidden_width
