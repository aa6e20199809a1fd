"""``python -m studies.repair``."""

from __future__ import annotations

import sys

from studies.repair.run import main

sys.exit(main())
