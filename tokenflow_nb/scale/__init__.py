"Many clips on many machines, and one long clip on several GPUs."
