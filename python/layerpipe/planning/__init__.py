"""A pipeline before it is trained: where to cut, what memory each stage needs, what each schedule would give."""
