"""File systems of URLs: object stores through pyarrow, the Hugging Face hub, web servers and others through fsspec."""
