"""Compressed checkpoints in other formats: dense, for any tool; ONNX; and with the code that runs them."""

from kronpress.export.formats import FORMATS, export_checkpoint

__all__ = ["FORMATS", "export_checkpoint"]
