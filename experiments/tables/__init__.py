"""From records to tables and plots; nothing here trains, and no figure is typed by hand."""
