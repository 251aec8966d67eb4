"What an edit will need before it is made: evaluations, seconds, memory, disk."
