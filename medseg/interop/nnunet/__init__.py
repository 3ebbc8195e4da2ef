"""Models of nnU-Net, versions 1 and 2: read without running anything in them, and written."""
