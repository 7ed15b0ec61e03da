"""What models cost: parameters and operations counted, time and memory measured side by side."""
