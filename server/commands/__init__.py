"""The commands of `linalign`. Each module is imported only when its command runs."""
