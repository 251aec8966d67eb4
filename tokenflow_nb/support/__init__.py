"What all modules use: checks of arguments, settings, progress, files, locks, memory."
