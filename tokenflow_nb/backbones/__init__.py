"The models that an edit can be made with: one file for each family, behind one protocol."
