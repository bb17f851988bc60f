"""Small experiments that show whether the idea of each paradigm works: `python -m benchmarks.ideas ROW…`.

An experiment is the module of this package that has the row's name, with `_` for `-`. It holds one function::

    def marks(seed: int, folder: Path, control: bool) -> Iterator[Mark]:

which writes toy episodes as a dataset (`toys`), trains on them through the product's own path (`training.train`), lets the
policy act in a toy world (`worlds.play`), and yields what was measured with its bar. With `control` it also measures what must
fail: the same with one thing broken that the idea needs.
"""
