"""A pipeline before it is trained: where to cut, what memory stages need, what schedules give and delays allow."""
