"""What the task bundled_books does to its file."""

from datasets import Dataset


def one_book_each(file: Dataset) -> Dataset:
    """A row for each book of the one row that the file is; a line `<|endoftext|>` ends a book."""
    (row,) = file
    books = (book.strip() for book in row["text"].split("<|endoftext|>"))
    return Dataset.from_dict({"text": [book for book in books if book]})
