"""``python -m less.cli`` is ``less-kv``."""

import sys

from less.cli import main

sys.exit(main())
