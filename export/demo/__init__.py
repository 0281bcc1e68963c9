"""The demo model: a MiniCPM-V of the official architecture, small enough to ship, trained here to read.

tokenizer  the byte-level BPE with the official special tokens
fonts      the typefaces, all from packages on PyPI
content    what stands in the pictures: strings, receipts, forms, scenes; which strings are held out
draw       content -> picture, and where each character stands
samples    a seeded stream of (picture, question, answer)
train      python -m lensc.export.demo.train
evaluate   python -m lensc.export.demo.evaluate
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The shipped checkpoint: what `demo` means to `lensc build`."""

PICTURES = Path(__file__).parent / "pictures"
"""Pictures to try it on, drawn by `lensc.export.demo.draw`; none was trained on."""
