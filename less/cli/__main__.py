"""``python -m less.cli`` is ``less-kv``."""

import sys

from less.cli import command

sys.exit(command())
