"""Pages that need nothing but themselves: markup that is always escaped, tables, plots; no script, no network."""

from fxcompress.html.markup import page, tag, write
from fxcompress.html.plots import bars, columns, curves
from fxcompress.html.tables import table

__all__ = ["bars", "columns", "curves", "page", "table", "tag", "write"]
