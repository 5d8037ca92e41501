"""``python -m convert`` is ``kvpatch``."""

from convert.cli import main

main()
