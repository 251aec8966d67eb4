"Panels for a notebook: look at features, step through a denoising, edit a clip, compare clips."
