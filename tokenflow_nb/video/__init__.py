"Video files: finding, reading, colour, sound, writing."
