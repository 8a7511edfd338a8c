"""`stablerep export`: weights where timm, transformers and open_clip load them without this project."""
