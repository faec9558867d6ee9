"""Before any test module imports mmdet or mmpose: what makes them importable on today's torch."""

import mmprune.compat  # noqa: F401
