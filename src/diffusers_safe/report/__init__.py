"""Reports: tables, plots, images and pages, for comparisons and attacks alike."""
