"""From records to tables, plots and the page; nothing here trains, and no figure is typed by hand."""
