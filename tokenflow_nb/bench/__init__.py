"What a machine makes of each preset: seconds, memory and quality, in a table."
