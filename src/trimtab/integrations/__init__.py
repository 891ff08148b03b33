"""trimtab inside other libraries."""
