"""What is measured side by side in one run: updates, whole steps, layers, exported nets, and their opponents."""
