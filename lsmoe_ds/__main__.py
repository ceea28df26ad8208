"""``python -m lsmoe_ds`` is the ``lsmoe`` command."""

from lsmoe_ds.cli import main

main()
