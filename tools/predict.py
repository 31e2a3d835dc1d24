#!/usr/bin/env python
"""What a trained student finds in pictures, folders and videos; see --help."""

from pcka_distill.predict import cli

if __name__ == "__main__":
    cli()
