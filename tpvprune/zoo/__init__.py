"""Models and data by name: timm models, CIFAR ResNets, image folders, arrays."""
