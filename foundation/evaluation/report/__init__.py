"""The report: one page of HTML that a browser shows without fetching anything, made of sections with figures."""

from foundation.evaluation.report.drawer import Drawer
from foundation.evaluation.report.kept import Shown, shown
from foundation.evaluation.report.page import Section, page
