"""Tables, progress and plots for people; nothing here decides anything."""
