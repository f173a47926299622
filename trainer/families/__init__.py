"""How timm models take tickets: a file a family, and the registry."""
