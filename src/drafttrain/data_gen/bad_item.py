"""Why an item of a source gives no record."""


class BadItem(Exception):
    """Why an item gives no record; it is put into quarantine."""
