"""``python -m studies.hardening``."""

from __future__ import annotations

import sys

from studies.hardening.run import main

sys.exit(main())
