"""What a run leaves behind, and how it is shown.

`folder` holds the record, `html` and `plots` draw it, `live` shows it while it grows, `compare` draws several runs.
Pictures need matplotlib, which is slow to import: take `write_report` from `trimtab.report.html` where it is used.
"""

from trimtab.report.diagnose import diagnose
from trimtab.report.folder import RunFolder
from trimtab.report.intervals import bootstrap_mean, mean_interval, wilson
from trimtab.report.live import LiveView

__all__ = ["LiveView", "RunFolder", "bootstrap_mean", "diagnose", "mean_interval", "wilson"]
