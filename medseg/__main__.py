"""`python -m medseg`: the `medseg` command of this interpreter."""

from medseg.cli.main import main

main()
