"""What BulletTrain is compared with."""
