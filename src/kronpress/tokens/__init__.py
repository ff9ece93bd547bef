"""Text and conversations to tokens: where they are (reading, chat), once for all (cache), and in what order (order)."""

from kronpress.tokens.reading import (
    RunningText,
    Split,
    Text,
    join_documents,
    load_running_text,
    load_text,
)
from kronpress.tokens.streams import TokenStream, pack
from kronpress.tokens.train_data import TrainData, Windows, data_names, load_train_data, load_train_tokens

__all__ = [
    "RunningText",
    "Split",
    "Text",
    "TokenStream",
    "TrainData",
    "Windows",
    "data_names",
    "join_documents",
    "load_running_text",
    "load_text",
    "load_train_data",
    "load_train_tokens",
    "pack",
]
