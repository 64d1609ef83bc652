"""Errors of storage.

StorageError                anything below
+-- ObjectMissingError      the catalog names an object that the store does not hold
+-- ObjectCorruptError      an object's bytes do not have the digest that names them
+-- StoreFullError          no space, or no permission, to write
+-- StoreUnavailableError   the store did not answer, though it was asked again and again
+-- CatalogError            the catalog cannot be opened or used
"""


class StorageError(Exception):
    """Base of all storage errors."""


class ObjectMissingError(StorageError):
    """An object is not in the store."""


class ObjectCorruptError(StorageError):
    """An object's bytes and its name disagree."""


class StoreFullError(StorageError):
    """The store cannot be written."""


class StoreUnavailableError(StorageError):
    """The store cannot be reached."""


class CatalogError(StorageError):
    """The catalog cannot be used."""
