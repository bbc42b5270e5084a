"""One page that shows what became of a model: ``write_report("page.html", compressed, original, data=batches)``."""

from fxcompress.report.document import bench_page, write_report
from fxcompress.report.facts import Case, gather

__all__ = ["Case", "bench_page", "gather", "write_report"]
