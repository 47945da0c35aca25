"""What a run leaves behind: metrics, sampled responses, progress, and a report to look at."""

from megatron_occ.observe.metrics import MetricsLogger, RolloutLog
from megatron_occ.observe.plot import Series, plot_series_svg, write_plot
from megatron_occ.observe.progress import Progress, Timers
from megatron_occ.observe.report import write_report
from megatron_occ.observe.summary import print_summary

__all__ = [
    "MetricsLogger",
    "Progress",
    "RolloutLog",
    "Series",
    "Timers",
    "plot_series_svg",
    "print_summary",
    "write_plot",
    "write_report",
]
