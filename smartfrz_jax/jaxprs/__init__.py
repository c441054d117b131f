"""Reading and running jaxprs."""
