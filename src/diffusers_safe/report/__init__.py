"""Reports: tables, plots, pictures and pages, for comparisons and attacks alike."""
