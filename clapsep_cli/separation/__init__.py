"""From a query and a mixture to its stems."""
