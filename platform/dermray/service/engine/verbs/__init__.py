"""Every question that a model can be asked, in a file each: what it takes, needs, and how it is answered."""
