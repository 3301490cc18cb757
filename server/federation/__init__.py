"""A federated run: who may take part, what each is asked, and the rounds over whoever is connected."""
