"""Arrays of which parts are frozen: rows of stacked parameters, and lookups in tables that are read elsewhere, too."""
